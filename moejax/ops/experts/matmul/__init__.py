"""The grouped matmul of the experts: ``api`` chooses among the implementations, one file each."""
