"""What a rollout engine adds to each of vLLM's workers: it runs beside the weights, one on every device."""

from metaalign_rl.weights import Digest, WeightUpdate, unpack


class WeightReceiver:
    """Mixed into vLLM's worker class by name (`worker_extension_cls`)."""

    def receive_weights(self, update: WeightUpdate) -> str:
        """Load an update into this device's model; the checksum of the tensors that vLLM's loader took."""
        digest = Digest()
        self.reload_weights(weights_iterator=digest.watch(unpack(update)))  # type: ignore[attr-defined]
        return digest.hexdigest()
