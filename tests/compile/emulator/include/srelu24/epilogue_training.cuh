// Training epilogues need a GPU.
#pragma once
