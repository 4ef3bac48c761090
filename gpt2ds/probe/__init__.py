"""What is observed about memory: live bytes, counted tensor by tensor while a program runs, on a CPU or on no device at
all.
"""
