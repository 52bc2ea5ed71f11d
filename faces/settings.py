"""Settings of an alignment, without torch or OpenCV: the fields are flags of align_faces.py."""

from dataclasses import dataclass

from common.flags import flag


@dataclass(frozen=True)
class AlignSettings:
    """Settings that the crops depend on."""

    size: int = flag(256, "side of the aligned faces in pixels")
    faces: str = flag("largest", "largest | all | INDEX; 0 is the largest face of a photo")
    aligned_tolerance: float = flag(4.0, "%% of the side: take nearly aligned photos as they are")
    max_yaw: float = flag(90.0, "leave out heads that are turned further, in degrees; 90: none")
