"""From text to batches: `sources` finds the documents, `prepare` encodes them into token `shards`, `batches` says
which window each rank reads."""
