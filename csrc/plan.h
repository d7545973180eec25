// The table of cbp_fast/state/table.py and the byte buffer that it describes, as structs.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace cbp {

constexpr int MAX_DIMS = 5;

// What the fields of a rule's arithmetic may be; cbp_fast/rules/arithmetic.py numbers and explains them.
enum class Activation : int64_t { kNone, kMagnitude, kCentred };
enum class Outgoing : int64_t { kNone, kSum, kMean };
enum class Incoming : int64_t { kNone, kTimesSum, kDivide };
enum class Normalisation : int64_t { kNone, kMinMax };
enum class Score : int64_t { kCorrected, kPerStep, kRandom };
enum class Accrual : int64_t { kEligible, kAll, kWhole };
enum class Count : int64_t { kFloor, kCoin, kOne };
enum class Distribution : int64_t { kUniform, kNormal, kUnit };

struct Header {
  int64_t groups, slots, weights, regions, makers, units, columns, utility_bytes;
  Activation activation;
  int64_t keeps_mean;  // a running mean of every column
  Outgoing outgoing;
  Incoming incoming;
  Normalisation normalisation;
  Score score;
  Accrual accrual;
  Count count;
  int64_t step, seed, hyper, pending, num_replaced, seen, sums, feature, running_mean, utility, age, num_chosen, chosen;
  int64_t bytes;
  int64_t flat;           // length of what `sum_` writes: by slot, by column, and the sums of weights
  int64_t previous_mean;  // h_hat is that of the step before, which all processes know
};
// the indices along an axis that belong to unit j: start + j * unit_stride + p * position_stride, p < per_unit
struct Block {
  int64_t start, unit_stride, per_unit, position_stride;
  int64_t index(int64_t j, int64_t p) const { return start + j * unit_stride + p * position_stride; }
};
struct Group {
  int64_t first_unit, units, columns_per_unit, first_slot, slots, first_maker, makers, stream;
};
struct Slot {
  int64_t group, first_column, columns, weight, spatial, features;
  Block block;  // of the layer's features
  // what this process sees: the layer's input has this many features there, the group's from one of them on are so many
  // columns from `seen_column` on; and whether the samples, and what is summed over them, are not another's to count
  int64_t seen_features, seen_feature, seen_column, seen_columns, counts, adds;
  // the place of feature (j, p) among the columns
  int64_t column(int64_t j, int64_t p) const { return j * block.unit_stride + p * block.position_stride; }
};
// a layer that makes units, where the rule reads its weight
struct Maker {
  int64_t weight;
  Block block;  // of the layer's outputs
};
struct Weight {
  int64_t dtype, dims, size[MAX_DIMS], conv_groups;
  int64_t out_axis;                   // 0 rows are outputs, 1 columns are
  int64_t reads_rows, reads_columns;  // which sums are needed
  int64_t rows, columns;              // where they lie in what `sum_` writes
  // the part of it that is here, where its own sums begin among those, and whether they are not another's to add
  int64_t part[MAX_DIMS], part_groups, part_row, part_column, adds;
  int64_t outputs() const { return out_axis == 0 ? rows : columns; }
  int64_t inputs() const { return out_axis == 0 ? columns : rows; }
  int64_t numel() const { return size[0] * size[1] * size[2] * size[3] * size[4]; }
};
enum class RegionKind : int64_t { kDraw, kFill, kTransfer };
struct Region {
  RegionKind kind;
  int64_t group, axis;
  Block block;
  int64_t conv_groups, stream;
  Distribution distribution;  // with `value` as its bound or deviation
  double value;
  int64_t slot, dims, size[MAX_DIMS];
  int64_t part[MAX_DIMS], first[MAX_DIMS];  // of the tensor that is here: its sizes, and where it lies in the whole
};
static_assert(sizeof(Header) == 32 * 8 && sizeof(Group) == 8 * 8 && sizeof(Slot) == 16 * 8 && sizeof(Maker) == 5 * 8 &&
              sizeof(Weight) == 22 * 8 && sizeof(Region) == 28 * 8);

struct Plan {
  const Header* header;
  const Group* groups;
  const Slot* slots;
  const Maker* makers;
  const Weight* weights;
  const Region* regions;

  explicit Plan(const int64_t* table) {
    header = reinterpret_cast<const Header*>(table);
    groups = reinterpret_cast<const Group*>(header + 1);
    slots = reinterpret_cast<const Slot*>(groups + header->groups);
    makers = reinterpret_cast<const Maker*>(slots + header->slots);
    weights = reinterpret_cast<const Weight*>(makers + header->makers);
    regions = reinterpret_cast<const Region*>(weights + header->weights);
  }
  // how many int64 the table must have; only the header is read
  static int64_t size(const Header& h) {
    const size_t bytes = sizeof(Header) + h.groups * sizeof(Group) + h.slots * sizeof(Slot) + h.makers * sizeof(Maker) +
                         h.weights * sizeof(Weight) + h.regions * sizeof(Region);
    return static_cast<int64_t>(bytes / 8);
  }
};

// views of the buffer; utility is float or double by Header::utility_bytes
struct Fields {
  int64_t *step, *seed;
  double *rate, *maturity, *decay, *pending;
  int64_t *num_replaced, *seen;
  double *sums, *feature, *running_mean;
  void* utility;
  int32_t *age, *num_chosen, *chosen;

  Fields(const Header& h, void* buffer) {
    const auto at = [&](int64_t offset) { return static_cast<char*>(buffer) + offset; };
    step = reinterpret_cast<int64_t*>(at(h.step));
    seed = reinterpret_cast<int64_t*>(at(h.seed));
    rate = reinterpret_cast<double*>(at(h.hyper));
    maturity = rate + 1;
    decay = rate + 2;
    pending = reinterpret_cast<double*>(at(h.pending));
    num_replaced = reinterpret_cast<int64_t*>(at(h.num_replaced));
    seen = reinterpret_cast<int64_t*>(at(h.seen));
    sums = reinterpret_cast<double*>(at(h.sums));
    feature = reinterpret_cast<double*>(at(h.feature));
    running_mean = reinterpret_cast<double*>(at(h.running_mean));
    utility = at(h.utility);
    age = reinterpret_cast<int32_t*>(at(h.age));
    num_chosen = reinterpret_cast<int32_t*>(at(h.num_chosen));
    chosen = reinterpret_cast<int32_t*>(at(h.chosen));
  }
};

// 1 - decay^age in double; 1 for decay = 0
class BiasCorrection {
 public:
  explicit BiasCorrection(double decay) : log_decay_(std::log(decay)) {}
  double operator()(int64_t age) {
    // most units have the age of their neighbour
    if (age != age_) {
      age_ = age;
      value_ = age == 0 ? 0.0 : -std::expm1(static_cast<double>(age) * log_decay_);
    }
    return value_;
  }

 private:
  double log_decay_;
  int64_t age_ = 0;
  double value_ = 0.0;
};

}  // namespace cbp
