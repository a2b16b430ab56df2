"""What a training step costs, and what it must cost: FLOPs, time and memory beside their floors."""
