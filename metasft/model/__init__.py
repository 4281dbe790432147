"""What happens to tensors: the inner loop, stacked adapters, packed attention, the response loss."""
