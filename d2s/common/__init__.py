"""What all rooms share, without torch: command lines, files and folders, progress, processes."""
