"""How alike two images are (SSIM), and what follows from it: centres, clusters, hardest negatives."""
