"""Benchmarks: script/bench NAME runs one."""
