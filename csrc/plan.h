// The table of cbp_fast/state.py (`State._pack`) and the byte buffer that it describes, as structs.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace cbp {

constexpr int MAX_DIMS = 5;

struct Header {
  int64_t groups, slots, weights, regions, incoming, units, columns, utility_bytes;
  int64_t activation;    // 0 none, 1 mean abs(h), 2 mean abs(h - h_hat)
  int64_t keeps_mean;    // a running mean of every column
  int64_t outgoing;      // 0 none, 1 sum, 2 mean of abs(W_out)
  int64_t incoming_use;  // 0 none, 1 times the sum, 2 divided by the mean of abs(W_in)
  int64_t min_max;
  int64_t score;    // 0 u / (1 - decay^age), 1 u / age, 2 random
  int64_t accrual;  // 0 rate * eligible, 1 rate * units once one is eligible, 2 the first truncated
  int64_t count;    // 0 floor(pending), 1 a coin for the fraction, 2 one if more than one is pending
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
  int64_t first_unit, units, columns_per_unit, first_slot, slots, first_incoming, incoming, stream;
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
struct Incoming {
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
struct Region {
  int64_t kind;  // 0 draw, 1 fill, 2 transfer
  int64_t group, axis;
  Block block;
  int64_t conv_groups, stream;
  int64_t distribution;  // 0 uniform in [-value, value), 1 normal with deviation value, 2 uniform in [0, 1)
  double value;
  int64_t slot, dims, size[MAX_DIMS];
  int64_t part[MAX_DIMS], first[MAX_DIMS];  // of the tensor that is here: its sizes, and where it lies in the whole
};
static_assert(sizeof(Header) == 32 * 8 && sizeof(Group) == 8 * 8 && sizeof(Slot) == 16 * 8 &&
              sizeof(Incoming) == 5 * 8 && sizeof(Weight) == 22 * 8 && sizeof(Region) == 28 * 8);

struct Plan {
  const Header* header;
  const Group* groups;
  const Slot* slots;
  const Incoming* incoming;
  const Weight* weights;
  const Region* regions;

  explicit Plan(const int64_t* table) {
    header = reinterpret_cast<const Header*>(table);
    groups = reinterpret_cast<const Group*>(header + 1);
    slots = reinterpret_cast<const Slot*>(groups + header->groups);
    incoming = reinterpret_cast<const Incoming*>(slots + header->slots);
    weights = reinterpret_cast<const Weight*>(incoming + header->incoming);
    regions = reinterpret_cast<const Region*>(weights + header->weights);
  }
  // how many int64 the table must have; only the header is read
  static int64_t size(const Header& h) {
    const size_t bytes = sizeof(Header) + h.groups * sizeof(Group) + h.slots * sizeof(Slot) +
                         h.incoming * sizeof(Incoming) + h.weights * sizeof(Weight) + h.regions * sizeof(Region);
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
