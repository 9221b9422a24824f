"""What is written another way only because XLA:CPU compiles it better. The main path can be read without it."""
