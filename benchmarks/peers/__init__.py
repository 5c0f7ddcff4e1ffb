"""What the backend is compared with: programs of their own that share nothing with it but the model."""

ANSWER = b'{"results": [{"result": [{"value": {"choices": ["Mars"]}}], "score": 0.5, "model_version": "bare"}]}'
HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(ANSWER)))]
