"""TensorBoard, progress bars and plots of a training."""
