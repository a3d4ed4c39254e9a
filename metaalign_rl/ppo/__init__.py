"""PPO: the controller's loop and what it does between the actors."""
