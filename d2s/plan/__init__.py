"""What a training will take: parameters, memory, traffic, time."""
