"""Helpers for all packages of d2s, without torch: command lines, files and folders, progress, processes."""
