from typing import Any

Allocator = Any
