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
        record = {"id": request.request_id, "client": self.client_of(request)}
        with Path(os.environ[FILE]).open("a") as stream:
            stream.write(json.dumps(record) + "\n")
