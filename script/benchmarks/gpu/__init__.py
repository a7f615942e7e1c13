"""Everything that a CUDA card decides: script/bench gpu."""
