"""Agents that decide which tokens stay visible."""
