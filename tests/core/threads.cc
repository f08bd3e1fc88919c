// Readers beside a writer, for ThreadSanitizer: no part of marble, and not built with it. docs/testing.md says how to run it.
//
// One thread writes a memtable. Others take its states, and read them merged with two files whose decoded blocks go through one cache
// that is too small for them: scans that end and scans that are given up, look-ups of many keys and of one, counts. What is read must be what was written:
// every key is there in every state, and its value is that of the state's index or an older one.

#include <arrow/api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "lsm.hpp"
#include "memtable.hpp"
#include "sstable_writer.hpp"

using namespace marble;

namespace {

constexpr int kKeys = 3000, kWrites = 150, kReaders = 4, kReadsEach = 25;

void Check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void Check(const arrow::Status& status) { Check(status.ok(), status.ToString().c_str()); }

std::shared_ptr<arrow::Schema> Schema() {
  return arrow::schema({arrow::field("k", arrow::int64(), false), arrow::field("v", arrow::int64(), false)});
}

// Keys first, first + step, ... below kKeys, all with `value`.
std::shared_ptr<arrow::RecordBatch> Rows(int64_t first, int64_t step, int64_t value) {
  arrow::Int64Builder keys, values;
  for (int64_t key = first; key < kKeys; key += step) {
    Check(keys.Append(key));
    Check(values.Append(value));
  }
  const int64_t count = keys.length();
  return arrow::RecordBatch::Make(Schema(), count, {*keys.Finish(), *values.Finish()});
}

std::shared_ptr<const TableFile> File(int64_t step, uint64_t index, std::shared_ptr<const Layout> layout,
                                      std::shared_ptr<BlockCache> cache) {
  WriterOptions options;
  options.block_rows_max = 64;
  if (step == 1) options.compression = "lz4";  // Rows of the other are read alone.
  std::shared_ptr<TableWriter> writer;
  Check(TableWriter::Make(Schema(), {"k"}, options, &writer));
  const auto rows = Rows(0, step, static_cast<int64_t>(index));
  arrow::UInt64Builder indexes;
  for (int64_t i = 0; i < rows->num_rows(); ++i) Check(indexes.Append(index));
  TableWriter::Buffers parts;
  Check(writer->Add(*rows, **indexes.Finish(), nullptr, &parts));
  std::shared_ptr<arrow::Buffer> rest;
  FileSummary summary;
  Check(writer->Finish(&rest, &summary));
  parts.push_back(rest);
  std::shared_ptr<const TableFile> file;
  Check(TableFile::Open(*arrow::ConcatenateBuffers(parts), summary.name, std::move(layout), std::move(cache), &file));
  return file;
}

// A state of `index` has every key, with a value no newer than that.
void ReadOnce(const MemtableCore& table, const LsmReader& files, unsigned seed) {
  const auto state = table.Take();
  std::shared_ptr<const LsmReader> reader;
  Check(files.WithStates({state}, &reader));
  const auto newest = std::max<int64_t>(2, static_cast<int64_t>(state->index));  // The files are of 1 and 2.
  ScanOptions options;
  options.columns = {0, 1};
  options.batch_rows_max = 500;
  options.reverse = seed % 3 == 0;
  std::shared_ptr<MergeCursor> cursor;
  Check(reader->Scan(options, {}, &cursor));
  ScanBatch batch;
  int64_t count = 0;
  for (unsigned most = seed % 4 == 0 ? 2 : ~0U; most > 0; --most) {
    Check(cursor->Next(&batch));
    if (batch.rows == nullptr) break;
    const auto& values = static_cast<const arrow::Int64Array&>(*batch.rows->column(1));
    for (int64_t i = 0; i < values.length(); ++i) Check(values.Value(i) <= newest, "a value of the future");
    count += values.length();
  }
  Check(seed % 4 == 0 || count == kKeys, "a scan missed keys");
  const auto wanted = Rows(seed % 7, 7, 0)->SelectColumns({0});
  std::shared_ptr<arrow::RecordBatch> rows;
  std::shared_ptr<arrow::Array> found;
  Check(reader->GetMany(**wanted, {0, 1}, &rows, &found));
  Check(static_cast<const arrow::BooleanArray&>(*found).true_count() == rows->num_rows(), "a look-up missed keys");
  for (int64_t key = seed % 11; key < kKeys; key += 97) {
    std::string encoded(8, '\0');  // As the key codec writes an int64: its sign turned, the highest byte first.
    for (int byte = 0; byte < 8; ++byte) {
      encoded[byte] = static_cast<char>((static_cast<uint64_t>(key) ^ (uint64_t{1} << 63)) >> (56 - 8 * byte));
    }
    PointHit hit;
    if (!reader->FindInMemory(encoded, &hit)) Check(reader->FindInFiles(encoded, &hit));
    Check(hit.source != nullptr, "a single look-up missed a key");
    Check(LoadValue<int64_t>(hit.source->views[1], hit.row) <= newest, "a single look-up found a value of the future");
  }
  uint64_t counted = 0;
  Check(reader->CountRows(options, &counted));
  Check(counted == kKeys, "a count missed keys");
}

}  // namespace

int main() {
  std::shared_ptr<MemtableCore> table;
  Check(MemtableCore::Make(Schema(), {"k"}, true, &table));
  const auto cache = std::make_shared<BlockCache>(16 << 10);
  const auto layout = table->Take()->layout;
  std::shared_ptr<const LsmReader> files;
  Check(LsmReader::Make({}, {{File(2, 2, layout, cache)}, {File(1, 1, layout, cache)}}, &files));
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < kReaders; ++number) {
    threads.emplace_back([&, number] {
      for (unsigned i = 0; i < kReadsEach; ++i) ReadOnce(*table, *files, number + i);
    });
  }
  for (int write = 0; write < kWrites; ++write) {
    const int64_t index = 3 + write;
    Check(table->Upsert(*Rows(write % 5, 5, index), static_cast<uint64_t>(index)));
  }
  for (auto& thread : threads) thread.join();
  std::printf("%d reads beside %d writes\n", kReaders * kReadsEach, kWrites);
  return 0;
}
