// Making an sstable: rows in, the bytes of the file out, a block at a time.
//
// Layout of the bytes: sstable_format.hpp.
// Ownership: rows are kept by reference until their block is full; buffers that were given out belong to the caller.
// Thread safety: a writer belongs to one thread at a time.
// Invariants:
//   1. Keys ascend strictly over all of a file; what breaks this is refused before anything of it is in a block.
//   2. What was given out, in order, is the file up to `nbytes`; `name_` has hashed exactly that.
//   3. Of a tombstone only the key is kept.
#pragma once

#include "bloom.hpp"
#include "file_parts.hpp"
#include "sstable_footer.hpp"
#include "sstable_zones.hpp"

#include "memtable_state.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/array/concatenate.h>
#include <arrow/io/memory.h>
#include <arrow/ipc/writer.h>
#include <arrow/util/bitmap_ops.h>
#include <arrow/util/byte_size.h>
#include <arrow/util/compression.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace marble {

struct WriterOptions {
  int64_t block_rows_max = 4096;
  int64_t block_bytes_max = 64 << 10;
  std::string compression;  // "", "lz4" or "zstd"
  std::string ttl_column;   // Empty: none.
};

// What a finished file holds.
struct FileSummary {
  IndexHead head;
  std::string name;  // 32 hex digits
  uint64_t bytes = 0;
  std::string first_key, last_key;
};

class TableWriter {
 public:
  using Buffers = std::vector<std::shared_ptr<arrow::Buffer>>;

  static arrow::Status Make(std::shared_ptr<arrow::Schema> schema, const std::vector<std::string>& key,
                            const WriterOptions& options, std::shared_ptr<TableWriter>* out) noexcept {
    return Guarded([&]() -> arrow::Status {
      auto writer = std::make_shared<TableWriter>();
      writer->options_ = options;
      ARROW_RETURN_NOT_OK(Layout::Make(std::move(schema), key, &writer->layout_));
      ARROW_ASSIGN_OR_RAISE(writer->schema_, FileSchema(*writer->layout_));
      ARROW_RETURN_NOT_OK(writer->CheckOptions());
      writer->has_parts_ = options.compression.empty() && !DescribeFlat(*writer->schema_, writer->layout_->key).empty();
      for (const auto& field : writer->layout_->schema->fields()) writer->zones_.emplace_back(field->type());
      XXH3_128bits_reset(&writer->name_);
      *out = std::move(writer);
      return arrow::Status::OK();
    });
  }

  const std::shared_ptr<arrow::Schema>& schema() const noexcept { return schema_; }
  uint64_t nbytes() const noexcept { return nbytes_; }
  uint64_t rows() const noexcept { return hashes_.size(); }

  // `deleted` may be null. Appends to `out` what is ready.
  arrow::Status Add(const arrow::RecordBatch& batch, const arrow::Array& indexes, const arrow::Array* deleted,
                    Buffers* out) noexcept {
    if (spent_) return arrow::Status::Invalid("the writer has finished, or has failed");
    spent_ = true;
    const arrow::Status status = Guarded([&]() { return Take(batch, indexes, deleted, out); });
    spent_ = !status.ok();
    return status;
  }

  arrow::Status Finish(std::shared_ptr<arrow::Buffer>* out, FileSummary* summary) noexcept {
    if (spent_) return arrow::Status::Invalid("the writer has finished, or has failed");
    if (hashes_.empty()) return arrow::Status::Invalid("an sstable has at least one row, this one has none");
    spent_ = true;
    return Guarded([&]() -> arrow::Status {
      Buffers rest;
      if (pending_rows_ > 0) ARROW_RETURN_NOT_OK(WriteBlock(&rest));
      ARROW_RETURN_NOT_OK(WriteIndex(&rest, summary));
      ARROW_ASSIGN_OR_RAISE(*out, arrow::ConcatenateBuffers(rest));
      summary->bytes = nbytes_;
      summary->first_key = keys_.substr(0, entries_.front().first_key_bytes);
      summary->last_key = last_key_;
      summary->name = HexName(XXH3_128bits_digest(&name_));
      return arrow::Status::OK();
    });
  }

 private:
  // Rows [first, end) of a batch that wait for their block.
  struct Piece {
    std::vector<std::shared_ptr<arrow::ArrayData>> columns;  // The table's, then indexes and deletions.
    std::shared_ptr<const KeyColumn> keys;
    int64_t first, end;
  };

  arrow::Status CheckOptions() {
    if (options_.block_rows_max < 1 || options_.block_bytes_max < 1) {
      return arrow::Status::Invalid("a block has at least one row and one byte, got block_rows_max ",
                                    options_.block_rows_max, " and block_bytes_max ", options_.block_bytes_max);
    }
    ipc_.use_threads = false;
    if (options_.compression == "lz4") {
      ARROW_ASSIGN_OR_RAISE(ipc_.codec, arrow::util::Codec::Create(arrow::Compression::LZ4_FRAME));
    } else if (options_.compression == "zstd") {
      ARROW_ASSIGN_OR_RAISE(ipc_.codec, arrow::util::Codec::Create(arrow::Compression::ZSTD));
    } else if (!options_.compression.empty()) {
      return arrow::Status::Invalid("unknown compression '", options_.compression, "': use 'lz4', 'zstd' or none");
    }
    if (options_.ttl_column.empty()) return arrow::Status::OK();
    ttl_ = layout_->schema->GetFieldIndex(options_.ttl_column);
    if (ttl_ < 0) return arrow::Status::Invalid("TTL column '", options_.ttl_column, "' is no column of the table");
    const auto& type = *layout_->schema->field(ttl_)->type();
    const auto id = type.id();
    if (!arrow::is_signed_integer(id) && id != arrow::Type::DATE32 && id != arrow::Type::DATE64 &&
        id != arrow::Type::TIMESTAMP) {
      return arrow::Status::Invalid("TTL column '", options_.ttl_column, "' has type ", type.ToString(),
                                    ": use a signed integer, a date or a timestamp");
    }
    return arrow::Status::OK();
  }

  arrow::Status Take(const arrow::RecordBatch& batch, const arrow::Array& indexes, const arrow::Array* deleted,
                     Buffers* out) {
    ARROW_RETURN_NOT_OK(layout_->CheckBatch(batch));
    if (indexes.type_id() != arrow::Type::UINT64 || indexes.length() != batch.num_rows() || indexes.null_count() > 0) {
      return arrow::Status::Invalid("indexes are uint64, one for each of the ", batch.num_rows(), " rows, got ",
                                    indexes.length(), " of type ", indexes.type()->ToString());
    }
    if (deleted != nullptr && (deleted->type_id() != arrow::Type::BOOL || deleted->length() != batch.num_rows() ||
                               deleted->null_count() > 0)) {
      return arrow::Status::Invalid("deleted is bool, one for each of the ", batch.num_rows(), " rows, got ",
                                    deleted->length(), " of type ", deleted->type()->ToString());
    }
    if (batch.num_rows() == 0) return arrow::Status::OK();
    Piece piece{batch.column_data(), nullptr, 0, 0};
    std::vector<std::shared_ptr<arrow::ArrayData>> key_columns;
    for (const int column : layout_->key) key_columns.push_back(piece.columns[static_cast<size_t>(column)]);
    ARROW_ASSIGN_OR_RAISE(piece.keys, layout_->codec->EncodeColumns(key_columns, batch.num_rows()));
    ARROW_RETURN_NOT_OK(TakeKeys(*piece.keys));
    piece.columns.push_back(indexes.data());
    if (deleted == nullptr) {
      ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> none, arrow::AllocateEmptyBitmap(batch.num_rows()));
      piece.columns.push_back(
          arrow::ArrayData::Make(arrow::boolean(), batch.num_rows(), {nullptr, std::move(none)}, 0));
    } else {
      piece.columns.push_back(deleted->data());
    }
    const std::vector<uint32_t> sizes = RowSizes(piece.columns, batch.num_rows());
    for (int64_t row = 0; row < batch.num_rows(); ++row) {
      const int64_t bytes = sizes[static_cast<size_t>(row)];
      const bool full = pending_rows_ == options_.block_rows_max ||
                        (pending_rows_ > 0 && pending_bytes_ + bytes > options_.block_bytes_max);
      if (full) {
        if (row > piece.first) pending_.push_back({piece.columns, piece.keys, piece.first, row});
        ARROW_RETURN_NOT_OK(WriteBlock(out));
        piece.first = row;
      }
      ++pending_rows_;
      pending_bytes_ += bytes;
    }
    piece.end = batch.num_rows();
    pending_.push_back(std::move(piece));
    return arrow::Status::OK();
  }

  // Checks that keys ascend, and hashes them.
  arrow::Status TakeKeys(const KeyColumn& keys) {
    std::string_view last = last_key_;
    bool any = !hashes_.empty();
    hashes_.reserve(std::max(hashes_.capacity(), hashes_.size() + static_cast<size_t>(keys.rows)));
    for (int64_t row = 0; row < keys.rows; ++row) {
      const std::string_view key = KeyBytes(keys, row);
      if (any && key <= last) {
        return arrow::Status::Invalid("keys of an sstable ascend, row ", row, " of the batch ",
                                      key == last ? "has the key of the row before" : "belongs before the row before");
      }
      hashes_.push_back(HashKey(key));
      last = key;
      any = true;
    }
    last_key_ = std::string(last);
    return arrow::Status::OK();
  }

  // About how many bytes each row has in a block.
  static std::vector<uint32_t> RowSizes(const std::vector<std::shared_ptr<arrow::ArrayData>>& columns, int64_t rows) {
    int64_t bits = 0;
    for (const auto& column : columns) {
      const int64_t fixed = FixedBits(*column->type);
      const bool binary = arrow::is_base_binary_like(column->type->id());
      if (fixed > 0 || binary) {
        bits += fixed > 0 ? fixed : 8 * Stride(*column->type);
        continue;
      }
      // Of nested rows the average will do; but of these rows, not of all that share their buffers.
      const auto bytes = arrow::util::ReferencedBufferSize(*column);
      bits += (bytes.ok() ? *bytes : AboutBytes(*column)) * 8 / rows;
    }
    std::vector<uint32_t> sizes(static_cast<size_t>(rows), Clip((bits + 7) / 8));
    const auto add = [&sizes](const auto* offsets) {
      for (size_t i = 0; i < sizes.size(); ++i) {
        sizes[i] = Clip(static_cast<int64_t>(sizes[i]) + static_cast<int64_t>(offsets[i + 1] - offsets[i]));
      }
    };
    for (const auto& column : columns) {
      if (arrow::is_binary_like(column->type->id())) add(column->GetValues<int32_t>(1));
      if (arrow::is_large_binary_like(column->type->id())) add(column->GetValues<int64_t>(1));
    }
    return sizes;
  }
  static uint32_t Clip(int64_t bytes) noexcept {
    return static_cast<uint32_t>(std::min<int64_t>(bytes, std::numeric_limits<uint32_t>::max()));
  }

  void PutOut(std::shared_ptr<arrow::Buffer> buffer, Buffers* out) {
    XXH3_128bits_update(&name_, buffer->data(), static_cast<size_t>(buffer->size()));
    nbytes_ += static_cast<uint64_t>(buffer->size());
    out->push_back(std::move(buffer));
  }

  arrow::Status WriteHeader(Buffers* out) {
    ARROW_ASSIGN_OR_RAISE(schema_message_, EncodeSchema(*schema_));
    ARROW_ASSIGN_OR_RAISE(auto header, MakeHeader(*schema_message_));
    seal_.header_bytes = static_cast<uint64_t>(header->size());
    seal_.header_checksum = ChecksumOf(header->data(), seal_.header_bytes);
    PutOut(std::move(header), out);
    return arrow::Status::OK();
  }

  // Makes a block of all rows that wait.
  arrow::Status WriteBlock(Buffers* out) {
    if (nbytes_ == 0) ARROW_RETURN_NOT_OK(WriteHeader(out));
    std::vector<std::shared_ptr<arrow::ArrayData>> columns;
    for (size_t i = 0; i < pending_[0].columns.size(); ++i) {
      if (pending_.size() == 1) {
        const Piece& piece = pending_[0];
        columns.push_back(piece.columns[i]->Slice(piece.first, piece.end - piece.first));
        continue;
      }
      arrow::ArrayVector parts;
      for (const Piece& piece : pending_) {
        parts.push_back(arrow::MakeArray(piece.columns[i]->Slice(piece.first, piece.end - piece.first)));
      }
      ARROW_ASSIGN_OR_RAISE(auto whole, arrow::Concatenate(parts));
      columns.push_back(whole->data());
    }
    BlockEntry entry;
    entry.rows = static_cast<uint32_t>(pending_rows_);
    const arrow::ArrayData& deleted = *columns.back();
    entry.tombstones = static_cast<uint32_t>(
        arrow::internal::CountSetBits(deleted.buffers[1]->data(), deleted.offset, deleted.length));
    if (entry.tombstones > 0) ARROW_RETURN_NOT_OK(ClearTombstones(&columns));
    AddToHead(*columns[columns.size() - 2], &entry);
    for (size_t i = 0; i < zones_.size(); ++i) zones_[i].Add(*columns[i], InKey(i) ? 0 : entry.tombstones);
    if (ttl_ >= 0) AddTtl(*columns[static_cast<size_t>(ttl_)], deleted);
    const auto batch = arrow::RecordBatch::Make(schema_, pending_rows_, std::move(columns));
    ARROW_ASSIGN_OR_RAISE(auto message, MakeMessage(*batch, ipc_, nbytes_, &entry));
    const std::string_view first = KeyBytes(*pending_.front().keys, pending_.front().first);
    const std::string_view last = KeyBytes(*pending_.back().keys, pending_.back().end - 1);
    entry.key_offset = keys_.size();
    entry.first_key_bytes = static_cast<uint32_t>(first.size());
    entry.last_key_bytes = static_cast<uint32_t>(last.size());
    if (has_parts_ && entry.rows >= kPartRowsMin) AddParts(*message, CommonBytes(first, last), &entry);
    keys_.append(first).append(last);
    entries_.push_back(entry);
    PutOut(std::move(message), out);
    pending_.clear();
    pending_rows_ = 0;
    pending_bytes_ = 0;
    return arrow::Status::OK();
  }

  // What single rows of the block are found and checked by.
  void AddParts(const arrow::Buffer& message, uint64_t skip, BlockEntry* entry) {
    const uint64_t steps = entry->bytes / kStepBytes + 1;
    entry->step = static_cast<uint32_t>((entry->rows + steps - 1) / steps);
    for (uint64_t part = 0; part < PartsOf(*entry); ++part) {
      parts_.push_back(PartChecksum(message.data(), entry->bytes, part));
    }
    int64_t next = 0;  // Row of the block, and of the piece.
    for (const Piece& piece : pending_) {
      for (next += piece.first; next < piece.end; next += entry->step) words_.push_back(piece.keys->Word(next, skip));
      next -= piece.end;
    }
  }

  bool InKey(size_t column) const noexcept {
    for (const int key : layout_->key) {
      if (static_cast<size_t>(key) == column) return true;
    }
    return false;
  }

  // Makes columns outside of the key null where a row is a tombstone.
  arrow::Status ClearTombstones(std::vector<std::shared_ptr<arrow::ArrayData>>* columns) const {
    const arrow::ArrayData& deleted = *columns->back();
    const uint8_t* bits = deleted.buffers[1]->data();
    for (size_t i = 0; i + 2 < columns->size(); ++i) {
      if (InKey(i)) continue;
      auto column = (*columns)[i]->Copy();
      const int64_t end = column->offset + column->length;
      ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> bitmap, arrow::AllocateEmptyBitmap(end));
      arrow::internal::InvertBitmap(bits, deleted.offset, deleted.length, bitmap->mutable_data(), column->offset);
      if (column->buffers[0] != nullptr) {
        arrow::internal::BitmapAnd(bitmap->data(), column->offset, column->buffers[0]->data(), column->offset,
                                   column->length, column->offset, bitmap->mutable_data());
      }
      column->buffers[0] = std::move(bitmap);
      column->SetNullCount(arrow::kUnknownNullCount);
      (*columns)[i] = std::move(column);
    }
    return arrow::Status::OK();
  }

  void AddToHead(const arrow::ArrayData& indexes, BlockEntry* entry) {
    const uint64_t* values = indexes.GetValues<uint64_t>(1);
    const auto [smallest, largest] = std::minmax_element(values, values + indexes.length);
    entry->first_index = *smallest;
    entry->last_index = *largest;
    head_.first_index = head_.blocks == 0 ? entry->first_index : std::min(head_.first_index, entry->first_index);
    head_.last_index = std::max(head_.last_index, entry->last_index);
    head_.blocks += 1;
    head_.rows += entry->rows;
    head_.tombstones += entry->tombstones;
  }

  void AddTtl(const arrow::ArrayData& column, const arrow::ArrayData& deleted) {
    const uint8_t* validity = column.GetNullCount() > 0 ? column.buffers[0]->data() : nullptr;
    const int64_t width = FixedBits(*column.type) / 8;
    const uint8_t* values = column.GetValues<uint8_t>(1, column.offset * width);
    for (int64_t row = 0; row < column.length; ++row) {
      if (arrow::bit_util::GetBit(deleted.buffers[1]->data(), deleted.offset + row)) continue;
      if (validity != nullptr && !arrow::bit_util::GetBit(validity, column.offset + row)) {
        ttl_missing_ = true;
        continue;
      }
      uint64_t raw = 0;
      std::memcpy(&raw, values + row * width, static_cast<size_t>(width));
      const int shift = static_cast<int>(64 - 8 * width);
      const int64_t value = static_cast<int64_t>(raw << shift) >> shift;
      head_.ttl_min = head_.has_ttl == 0 ? value : std::min(head_.ttl_min, value);
      head_.ttl_max = head_.has_ttl == 0 ? value : std::max(head_.ttl_max, value);
      head_.has_ttl = 1;
    }
  }

  arrow::Result<std::shared_ptr<arrow::Buffer>> EncodeZones() const {
    arrow::FieldVector fields;
    std::vector<std::shared_ptr<arrow::ArrayData>> columns;
    for (size_t i = 0; i < zones_.size(); ++i) {
      const auto& field = *layout_->schema->field(static_cast<int>(i));
      fields.push_back(arrow::field(field.name() + ".nulls", arrow::uint64(), false));
      columns.push_back(zones_[i].Nulls());
      if (!zones_[i].has_order()) continue;
      for (const bool largest : {false, true}) {
        fields.push_back(arrow::field(field.name() + (largest ? ".max" : ".min"), field.type()));
        ARROW_ASSIGN_OR_RAISE(auto bound, zones_[i].Bound(largest));
        columns.push_back(std::move(bound));
      }
    }
    const auto batch = arrow::RecordBatch::Make(arrow::schema(std::move(fields)), static_cast<int64_t>(entries_.size()),
                                                std::move(columns));
    ARROW_ASSIGN_OR_RAISE(auto sink, arrow::io::BufferOutputStream::Create());
    ARROW_ASSIGN_OR_RAISE(auto stream, arrow::ipc::MakeStreamWriter(sink, batch->schema()));
    ARROW_RETURN_NOT_OK(stream->WriteRecordBatch(*batch));
    ARROW_RETURN_NOT_OK(stream->Close());
    return sink->Finish();
  }

  arrow::Status WriteIndex(Buffers* out, FileSummary* summary) {
    if (ttl_missing_) head_.has_ttl = 0;
    if (head_.has_ttl == 0) head_.ttl_min = head_.ttl_max = 0;
    ARROW_ASSIGN_OR_RAISE(auto zones, EncodeZones());
    const std::vector<uint8_t> bloom = BloomFilter::Build(hashes_);
    uint64_t end = AlignUp(sizeof(IndexHead), kFileAlignment);
    const auto place = [&end](IndexPlace* to, uint64_t bytes) {
      *to = {end, bytes};
      end = AlignUp(end + bytes, kFileAlignment);
    };
    place(&head_.entries, entries_.size() * sizeof(BlockEntry));
    place(&head_.keys, keys_.size());
    place(&head_.bloom, bloom.size());
    place(&head_.zones, static_cast<uint64_t>(zones->size()));
    place(&head_.parts, parts_.size() * sizeof(uint32_t));
    place(&head_.words, words_.size() * sizeof(uint64_t));
    seal_.index = nbytes_;
    const uint64_t head = AlignUp(nbytes_ + kMessagePrefixBytes, kFileAlignment) - nbytes_;
    seal_.index_bytes = head + end;
    ARROW_ASSIGN_OR_RAISE(std::shared_ptr<arrow::Buffer> index,
                          arrow::AllocateBuffer(static_cast<int64_t>(seal_.index_bytes)));
    uint8_t* to = index->mutable_data();
    std::memset(to, 0, seal_.index_bytes);
    const int32_t end_of_stream[2] = {-1, 0};
    std::memcpy(to, end_of_stream, sizeof(end_of_stream));
    const auto put = [to, head](uint64_t at, const void* from, uint64_t bytes) {
      if (bytes > 0) std::memcpy(to + head + at, from, bytes);
    };
    put(0, &head_, sizeof(head_));
    put(head_.entries.offset, entries_.data(), head_.entries.bytes);
    put(head_.keys.offset, keys_.data(), head_.keys.bytes);
    put(head_.bloom.offset, bloom.data(), head_.bloom.bytes);
    put(head_.zones.offset, zones->data(), head_.zones.bytes);
    put(head_.parts.offset, parts_.data(), head_.parts.bytes);
    put(head_.words.offset, words_.data(), head_.words.bytes);
    seal_.index_checksum = ChecksumOf(to, seal_.index_bytes);
    PutOut(std::move(index), out);
    seal_.size = nbytes_;
    ARROW_ASSIGN_OR_RAISE(auto footer, MakeFooter(entries_, *schema_message_, seal_));
    PutOut(std::move(footer), out);
    summary->head = head_;
    return arrow::Status::OK();
  }

  WriterOptions options_;
  std::shared_ptr<const Layout> layout_;
  std::shared_ptr<arrow::Schema> schema_;
  std::shared_ptr<arrow::Buffer> schema_message_;
  arrow::ipc::IpcWriteOptions ipc_ = arrow::ipc::IpcWriteOptions::Defaults();
  int ttl_ = -1;
  bool ttl_missing_ = false;  // Some row has no value there, and so never expires.
  bool spent_ = false;
  std::vector<Piece> pending_;
  int64_t pending_rows_ = 0;
  int64_t pending_bytes_ = 0;
  std::vector<BlockEntry> entries_;
  std::string keys_;      // First and last key of each block.
  std::string last_key_;  // Of all rows so far.
  std::vector<uint64_t> hashes_;
  bool has_parts_ = false;  // Whether blocks may have parts.
  std::vector<uint32_t> parts_;
  std::vector<uint64_t> words_;
  std::vector<ZoneColumn> zones_;
  IndexHead head_;
  FileSeal seal_;
  uint64_t nbytes_ = 0;
  XXH3_state_t name_;
};

}  // namespace marble
