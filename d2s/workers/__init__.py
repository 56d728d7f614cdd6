"""The worker processes of a run: their group, collectives, exchange of rows, watchdog and stop signals."""
