"""A FairScheduler that writes down which client each request belongs to, for tests of whole servers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flora_train.serving.fair_scheduler import FairScheduler

FILE = "FLORA_TRAIN_TEST_RECORD"
"""Environment variable with the file that gets one line per request."""


class RecordingScheduler(FairScheduler):
    def add_request(self, request: Any) -> None:
        super().add_request(request)
        client = self.client_of(request)
        weight = self.fair.weight(client)
        record = {
            "id": request.request_id,
            "client": client,
            "weight": weight,
            "server": request.client_index,
        }
        with Path(os.environ[FILE]).open("a") as stream:
            stream.write(json.dumps(record) + "\n")
