"""What a job will cost, said before any of it is done: sizes, memory, time, and whether it fits the target."""
