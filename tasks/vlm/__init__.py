"""The vision-language model: the requests of Figure 3, the clients that carry them, and the coordinator."""
