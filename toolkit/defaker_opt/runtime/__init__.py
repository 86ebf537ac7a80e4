"""Judge pictures with a build. Needs numpy and pillow, and the build's backend; never torch, onnx or yaml."""

from defaker_opt.runtime.build import Build, Manifest, open_build
from defaker_opt.runtime.session import Session, Verdict, open_session

__all__ = ["Build", "Manifest", "Session", "Verdict", "open_build", "open_session"]
