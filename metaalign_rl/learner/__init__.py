"""The DeepSpeed learner: batches, advantages, and the actor that updates policy and critic by PPO."""
