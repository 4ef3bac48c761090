"""What would go wrong with a run, found before it does. Looks and changes nothing."""
