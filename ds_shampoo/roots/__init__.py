"""Inverse roots on host threads: jobs, their schedule, the copies to and fro, and what became of every root."""
