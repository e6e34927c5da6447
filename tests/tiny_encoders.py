"""tools/tiny_encoder.py, for tests."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("tiny_encoder", Path(__file__).parents[1] / "tools" / "tiny_encoder.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
clip, t5 = tool.clip, tool.t5
