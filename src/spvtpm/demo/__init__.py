"""`python -m spvtpm.demo`: the main job on real processes, told and checked. A door: it sees every domain."""
