"""Linear layer on the optical matmul."""
