// Of torch, only what 2.10 has, whatever torch this is built with. Comes before all of torch's headers but pybind11's:
// torch 2.11 refuses its copy of those where a target is set.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000
