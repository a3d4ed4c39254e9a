"""Weights through Ray's object store: shared memory within a node, Ray's network between nodes."""

import ray

from metaalign_rl.weights.buckets import fill
from metaalign_rl.weights.engine_client import EnginesClient
from metaalign_rl.weights.weight_stream import WeightStream


class StoreTrainer:
    """The sending end, like vLLM's `TrainerWeightTransferEngine`. Importing that would cost a learner 8 s."""

    def __init__(self, client: EnginesClient, source: WeightStream, bucket_bytes: int, is_sender: bool) -> None:
        self._client, self._source = client, source
        self._bucket_bytes, self._is_sender = bucket_bytes, is_sender

    def send_weights(self) -> None:
        """Update all engines, one call per bucket. The next bucket is filled while the engines load the last one."""
        if not self._is_sender:
            return self._source.exhaust()
        for number, bucket in enumerate(fill(self._source, self._bucket_bytes)):
            stored = ray.put({"entries": bucket.entries, "data": bucket.data})
            if number == 0:  # as late as possible: engines generate nothing during an update
                self._client.start_weight_update()
            else:
                self._client.wait()  # so the store holds at most two buckets
            self._client.begin_update(stored)
            del stored
        self._client.finish_weight_update()
