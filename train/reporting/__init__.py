"""What is said, written, drawn and tracked: the console and the logs, the run's files, pictures, trackers."""
