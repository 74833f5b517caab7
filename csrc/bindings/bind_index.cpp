// SPDX-License-Identifier: Apache-2.0
// Byte rows and their scores for Python.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <deque>
#include <tuple>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/buffers.hpp"
#include "index/byte_rows.hpp"
#include "index/postings.hpp"
#include "index/unit_choice.hpp"
#include "index/unit_question.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace kv::bindings {
namespace {

// Rows whose memory Python owns; it is held as long as this object lives.
class HeldByteRows {
 public:
  HeldByteRows(const py::buffer& codes,
               const py::buffer& low,
               const py::buffer& step,
               std::size_t partitions,
               std::size_t rows,
               std::size_t width)
      : codes_(codes, false),
        low_(low, false),
        step_(step, false),
        rows_(codes_.readable(), low_.readable(), step_.readable(), partitions, rows, width) {}

  [[nodiscard]] const ByteRows& rows() const noexcept { return rows_; }

 private:
  HeldBuffer codes_;
  HeldBuffer low_;
  HeldBuffer step_;
  ByteRows rows_;
};

void encode(const py::buffer& rows,
            const py::buffer& codes,
            const py::buffer& low,
            const py::buffer& step,
            std::size_t partitions,
            std::size_t num_rows,
            std::size_t width) {
  const HeldBuffer from(rows, false);
  const HeldBuffer to(codes, true);
  const HeldBuffer lows(low, true);
  const HeldBuffer steps(step, true);
  const py::gil_scoped_release released;
  encode_byte_rows(from.readable(), to.writable(), lows.writable(), steps.writable(), partitions,
                   num_rows, width);
}

// Segments, queries, scores, queries per partition, columns of the scores.
using Job =
    std::tuple<std::vector<const HeldByteRows*>, py::buffer, py::buffer, std::size_t, std::size_t>;

void score(const std::vector<Job>& asked, std::size_t num_threads) {
  std::vector<HeldBuffer> held;
  std::vector<ScoreJob> jobs;
  held.reserve(2 * asked.size());
  jobs.reserve(asked.size());
  for (const auto& [segments, queries, scores, num_queries, stride] : asked) {
    const ConstBytes from = held.emplace_back(queries, false).readable();
    const Bytes to = held.emplace_back(scores, true).writable();
    ScoreJob job{{},
                 reinterpret_cast<const float*>(from.data()),
                 reinterpret_cast<float*>(to.data()),
                 num_queries,
                 stride};
    std::size_t rows = 0;
    for (const HeldByteRows* segment : segments) {
      KV_EXPECT(segment != nullptr, ShapeError, "a segment is None");
      const ByteRows& found = segment->rows();
      const std::size_t lines = found.partitions() * num_queries;
      KV_EXPECT(num_queries <= from.size() && stride <= to.size() &&
                    from.size() == lines * found.width() * sizeof(float) &&
                    to.size() == lines * stride * sizeof(float),
                ShapeError, "queries or scores do not fit the rows of a segment");
      rows += found.rows();
      job.segments.push_back(&found);
    }
    KV_EXPECT(rows <= stride, ShapeError, "there are more rows than columns for their scores");
    jobs.push_back(std::move(job));
  }
  const py::gil_scoped_release released;
  score_byte_rows(jobs, num_threads);
}

// Scores, weight, share of the neighbours.
using View = std::tuple<py::buffer, float, float>;
using Buffers = std::vector<py::buffer>;

bool choose(const std::vector<View>& asked,
            const Buffers& table,
            std::int64_t budget_tokens,
            std::size_t num_lists,
            const Buffers& out) {
  KV_EXPECT(
      table.size() == 4 && out.size() == 5, ShapeError,
      "a table is starts, sizes, before, tokens; room is fused, chosen, units, tokens, counts");
  std::vector<HeldBuffer> held;
  std::vector<UnitScores> views;
  held.reserve(asked.size() + table.size() + out.size());
  for (const auto& [scores, weight, share] : asked) {
    views.push_back({held.emplace_back(scores, false).readable(), weight, share});
  }
  std::vector<ConstBytes> from;
  for (const py::buffer& each : table) {
    from.push_back(held.emplace_back(each, false).readable());
  }
  std::vector<Bytes> to;
  for (const py::buffer& each : out) {
    to.push_back(held.emplace_back(each, true).writable());
  }
  const py::gil_scoped_release released;
  return choose_units(views, {from[0], from[1], from[2], from[3]}, budget_tokens, num_lists,
                      {to[0], to[1], to[2], to[3], to[4]});
}

// Segments, (float rows, how many count), whether it is a bound, whether heads share it, weight,
// share.
using Asked = std::tuple<std::vector<py::object>,
                         std::vector<std::pair<py::buffer, std::size_t>>,
                         bool,
                         bool,
                         float,
                         float>;

// A layer's units, whose memory Python owns; it is held as long as this object lives.
class HeldUnits {
 public:
  HeldUnits(const std::vector<Asked>& views, const Buffers& table) {
    KV_EXPECT(table.size() == 4, ShapeError, "a table is starts, sizes, before, tokens");
    for (const py::buffer& each : table) {
      table_.emplace_back(each, false);
    }
    for (const auto& [segments, floats, is_bound, is_shared, weight, share] : views) {
      AskedView& view = asked_.emplace_back(AskedView{{}, {}, is_bound, is_shared, weight, share});
      for (const py::object& segment : segments) {
        view.segments.push_back(&py::cast<const HeldByteRows&>(segment).rows());
        segments_.push_back(segment);
      }
      for (const auto& [rows, num_rows] : floats) {
        view.floats.push_back({floats_.emplace_back(rows, false).readable(), num_rows});
      }
    }
  }

  bool choose(const py::buffer& queries,
              const py::buffer& factors,
              const std::tuple<std::size_t, std::size_t, std::size_t>& shape,
              std::int64_t budget_tokens,
              std::size_t num_lists,
              std::size_t num_threads,
              const Buffers& out) const {
    KV_EXPECT(out.size() == 5, ShapeError, "room is fused, chosen, units, tokens, counts");
    const HeldBuffer from(queries, false);
    const HeldBuffer by(factors, false);
    std::vector<HeldBuffer> held;
    std::vector<Bytes> to;
    held.reserve(out.size());
    for (const py::buffer& each : out) {
      to.push_back(held.emplace_back(each, true).writable());
    }
    const py::gil_scoped_release released;
    const auto [heads, group, dim] = shape;
    return ask_units(
        asked_, {from.readable(), by.readable(), heads, group, dim},
        {table_[0].readable(), table_[1].readable(), table_[2].readable(), table_[3].readable()},
        budget_tokens, num_lists, num_threads, {to[0], to[1], to[2], to[3], to[4]});
  }

 private:
  std::vector<py::object> segments_;
  std::vector<HeldBuffer> table_;
  std::vector<HeldBuffer> floats_;
  std::vector<AskedView> asked_;
};

void score_words(const py::buffer& postings,
                 const py::buffer& sizes,
                 const std::array<py::buffer, 4>& words,
                 std::size_t num_tokens,
                 const py::buffer& totals) {
  const HeldBuffer from(postings, false);
  const HeldBuffer of_block(sizes, false);
  std::deque<HeldBuffer> held;
  std::array<ConstBytes, 4> views;
  std::transform(words.begin(), words.end(), views.begin(), [&held](const py::buffer& each) {
    return held.emplace_back(each, false).readable();
  });
  const HeldBuffer to(totals, true);
  const py::gil_scoped_release released;
  score_postings(from.readable(), of_block.readable(),
                 {views[0], views[1], views[2], views[3], num_tokens}, to.writable());
}

}  // namespace

void bind_index(py::module_& module) {
  py::class_<HeldByteRows>(module, "ByteRows")
      .def(py::init<const py::buffer&, const py::buffer&, const py::buffer&, std::size_t,
                    std::size_t, std::size_t>(),
           "codes"_a, "low"_a, "step"_a, "partitions"_a, "rows"_a, "width"_a);
  py::class_<HeldUnits>(module, "UnitRows")
      .def(py::init<const std::vector<Asked>&, const Buffers&>(), "views"_a, "table"_a)
      .def("choose", &HeldUnits::choose, "queries"_a, "factors"_a, "shape"_a, "budget_tokens"_a,
           "num_lists"_a, "num_threads"_a, "out"_a);
  module.def("encode_byte_rows", &encode, "rows"_a, "codes"_a, "low"_a, "step"_a, "partitions"_a,
             "num_rows"_a, "width"_a);
  module.def("score_postings", &score_words, "postings"_a, "sizes"_a, "words"_a, "num_tokens"_a,
             "totals"_a);
  module.def("score_byte_rows", &score, "jobs"_a, "num_threads"_a);
  module.def("choose_units", &choose, "views"_a, "table"_a, "budget_tokens"_a, "num_lists"_a,
             "out"_a);
}

}  // namespace kv::bindings
