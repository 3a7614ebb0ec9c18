// The order in which rows of B lie in shared memory, so that an epilogue needs no shuffles.
//
// In the accumulators of an MMA, a thread (t = lane % 4) owns columns 8j + 2t + b of a row. Which output column that is
// follows from the row of B that was loaded there. The loads put at row 8j + 2t + b of the tile
//
//   LoadOrder::kOwn8   row  8t + 2j + b of each 32 rows of B    (a thread gets 8 neighbours: one 16-byte store)
//   LoadOrder::kOwn16  row 16t + 2j + b of each 64 rows of B    (16 neighbours: 4 groups of 4)
#pragma once

namespace srelu24 {

enum class LoadOrder { kOwn8, kOwn16 };

}  // namespace srelu24
