"""Replicas of the Cog server behind one address, on Ray Serve; see docs/fleet.md."""
