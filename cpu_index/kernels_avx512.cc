// AVX-512 with BF16.
#include "cpu_index/coded_avx512.h"
#include "cpu_index/codes_avx512.h"
#include "cpu_index/rows_avx512.h"
#include "cpu_index/vector_avx512.h"

namespace quarry::kernels {

const Table& Avx512Table() {
  static constexpr Table kTable = {
      .name = "avx512",
      .attend_scratch_bytes = AttendScratch<Vector>::Bytes,
      .attend = Attend<Vector, ScoreAvx512>,
      .attend_coded_scratch_bytes = CodedScratchBytesAvx512,
      .attend_coded = AttendCodedAvx512,
      .score = ScoreAvx512,
      .accumulate = Accumulate<Vector>,
      .max = Max<Vector>,
      .exp_sum = ExpSum<Vector>,
      .scale = Scale<Vector>,
      .sum_codes = SumCodesAvx512,
      .score_nodes = ScoreNodesAvx512,
      .score_codes = ScoreCodesAvx512,
      .find_codes = FindCodesAvx512,
      .select = SelectAvx512,
      .exp_groups = ExpGroups<Vector>,
      .histogram = HistogramAvx512,
      .score_key_rows = ScoreKeyRowsAvx512,
      .add_value_rows = AddValueRowsAvx512,
      .measure_rows = MeasureRowsAvx512,
      .quantise = QuantiseAvx512,
  };
  return kTable;
}

}  // namespace quarry::kernels
