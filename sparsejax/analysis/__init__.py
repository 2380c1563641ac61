"""What a sparse network looks like and costs: summaries, FLOPs, overlap of masks, gradient flow, plots."""
