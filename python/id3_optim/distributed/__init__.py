"""Parameters that torch.distributed splits over ranks: what a rank holds, and what ranks exchange."""
