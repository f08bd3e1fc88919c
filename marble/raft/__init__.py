"""Raft as pure decisions: no clock, thread, file, socket or unseeded chance."""
