// AVX2 with FMA and F16C.
#include "cpu_index/coded_vector.h"
#include "cpu_index/codes_avx2.h"
#include "cpu_index/rows_avx2.h"
#include "cpu_index/vector_avx2.h"

namespace quarry::kernels {

const Table& Avx2Table() {
  static constexpr Table kTable = {
      .name = "avx2",
      .attend_scratch_bytes = AttendScratch<Vector>::Bytes,
      .attend = Attend<Vector, Score<Vector>>,
      .attend_coded_scratch_bytes = CodedScratch<Vector>::Bytes,
      .attend_coded = AttendCoded<Vector>,
      .score = Score<Vector>,
      .accumulate = Accumulate<Vector>,
      .max = Max<Vector>,
      .exp_sum = ExpSum<Vector>,
      .scale = Scale<Vector>,
      .sum_codes = SumCodesAvx2,
      .score_nodes = ScoreNodesAvx2,
      .score_codes = ScoreCodesAvx2,
      .find_codes = FindCodesAvx2,
      .select = SelectAvx2,
      .exp_groups = ExpGroups<Vector>,
      .histogram = HistogramAvx2,
      .score_key_rows = ScoreKeyRowsAvx2,
      .add_value_rows = AddValueRowsAvx2,
      .measure_rows = MeasureRowsAvx2,
      .quantise = QuantiseAvx2,
  };
  return kTable;
}

}  // namespace quarry::kernels
