"""wgmma, which four warps issue and the tensor cores do on their own time."""
TABLE = {}
