"""Data sets as folders of pictures, and how they are cut into FSCIL sessions (paper, Table 2)."""
