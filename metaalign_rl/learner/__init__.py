"""The DeepSpeed learner: batches, losses, and the actor that updates policy and critic."""
