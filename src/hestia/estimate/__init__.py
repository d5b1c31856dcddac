"""What a run will cost, from the model's configuration alone: memory, time and file sizes.

live.py      bytes alive during a computation that is only pretended
pretend.py   one step of each stage, pretended
memory.py    the peak of every stage, for one process or many
time.py      tokens, FLOPs and bytes moved, and hours on a machine that is probed or described
files.py     stored bytes in every file format, and what a run's folder holds
whole.py     all of it for one set of options
"""
