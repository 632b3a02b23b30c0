"""The corner of the package ``openai`` that docs/python.md uses, by urllib: the same requests, no package."""

import json
import types
import urllib.request


class OpenAI:
    """OpenAI(base_url, api_key).chat.completions.create(...)"""

    def __init__(self, base_url, api_key):
        self.url, self.key = base_url, api_key
        self.chat = types.SimpleNamespace(completions=self)

    def create(self, **body):
        request = urllib.request.Request(
            self.url + "/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response, object_hook=lambda fields: types.SimpleNamespace(**fields))
