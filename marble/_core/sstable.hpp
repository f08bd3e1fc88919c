// One sstable: its index, and its blocks, which are read, checked and kept when they are asked for.
//
// Layout of the bytes: sstable_format.hpp. A file's rows have the table's columns (all but the key nullable, since a
// tombstone has only a key) and two of our own, `_marble_index` and `_marble_deleted`.
// Ownership: a file shares the buffer that holds it, a mapping mostly; a block shares that too, unless it was
// decompressed. Arrays made of a block keep the mapping; a file may be closed while they are in use.
// Thread safety: immutable but for the cache and a memo of what was checked; every function may run in any number of
// threads at once, without the GIL.
// Invariants:
//   1. Keys of a file ascend strictly, in and across blocks.
//   2. Nothing of a block is interpreted before its checksum was found right; nothing of it is handed out before its
//      columns passed full validation and its keys were found to ascend from `first_key` to `last_key`. Single rows may be
//      read by the rules of block_parts.hpp instead.
//   3. What is wrong with the bytes is an IOError with a DamageDetail: the file and the offset of the damaged part.
#pragma once

#include "block.hpp"
#include "block_cache.hpp"
#include "bloom.hpp"
#include "damage.hpp"
#include "file_parts.hpp"
#include "gather.hpp"
#include "key_codec.hpp"
#include "memtable_state.hpp"
#include "sstable_footer.hpp"

#include <arrow/array/array_primitive.h>
#include <arrow/buffer.h>
#include <arrow/io/memory.h>
#include <arrow/ipc/message.h>
#include <arrow/ipc/reader.h>
#include <arrow/record_batch.h>
#include <arrow/result.h>
#include <arrow/status.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace marble {

class TableFile {
 public:
  // Checks all but the blocks. `name` is for messages.
  static arrow::Status Open(std::shared_ptr<arrow::Buffer> bytes, std::string name,
                            std::shared_ptr<const Layout> layout, std::shared_ptr<BlockCache> cache,
                            std::shared_ptr<const TableFile>* out) noexcept;
  ~TableFile() {
    if (slots_ != nullptr) cache_->Drop(slots_.get(), blocks());
  }

  const std::string& name() const noexcept { return name_; }
  const std::shared_ptr<const Layout>& layout() const noexcept { return layout_; }
  const FileSeal& seal() const noexcept { return seal_; }
  const IndexHead& head() const noexcept { return head_; }
  const std::shared_ptr<arrow::Buffer>& buffer() const noexcept { return bytes_; }

  size_t blocks() const noexcept { return words_.size(); }
  const BlockEntry& entry(size_t i) const noexcept { return entries_[i]; }
  std::string_view first_key(size_t i) const noexcept {
    return {keys_ + entries_[i].key_offset, entries_[i].first_key_bytes};
  }
  std::string_view last_key(size_t i) const noexcept {
    return {keys_ + entries_[i].key_offset + entries_[i].first_key_bytes, entries_[i].last_key_bytes};
  }
  // Of the whole file; a file has at least one row.
  std::string_view first_key() const noexcept { return first_key(0); }
  std::string_view last_key() const noexcept { return last_key(blocks() - 1); }

  // False if no row has the key of this hash (HashKey).
  bool MayContain(uint64_t hash) const noexcept { return bloom_.MayContain(hash); }
  const BloomFilter& bloom() const noexcept { return bloom_; }

  // First block whose last key is not below `key`: the only one that may have it. blocks() if there is none.
  size_t FindBlock(std::string_view key) const noexcept;
  // Sets `number` to the block in whose range `key` lies; false if it lies in none.
  bool FindRange(std::string_view key, size_t* number) const noexcept {
    if (key.substr(0, skip_) != common_) return false;
    const uint64_t word = WordOf(key, skip_);
    *number = FindBlock(key, word);
    if (*number == blocks()) return false;
    const uint64_t first = first_words_[*number];
    return word == first ? key >= first_key(*number) : word > first;
  }
  // Has fetched from memory what Cached and rows of block `i` need first.
  void Prefetch(size_t i) const noexcept {
    __builtin_prefetch(&slots_[i]);
    parts_.Prefetch(i);
  }

  // Block `i`, checked and decompressed, from the cache if it is there. May throw std::bad_alloc.
  arrow::Result<std::shared_ptr<const Block>> Load(size_t i) const;
  // Block `i` past the cache and checked again, whatever was found before: for merges, since a new file would give
  // damage a checksum that is right.
  arrow::Result<std::shared_ptr<const Block>> LoadAnew(size_t i) const { return Decode(i, true); }

  // Block `i` if it is in the cache, else null.
  std::shared_ptr<const Block> Cached(size_t i) const noexcept { return cache_->Get(&slots_[i]); }

  // Whether rows of block `i` can be read alone (PartialBlock). Only then what follows may be asked for.
  bool HasParts(size_t i) const noexcept { return parts_[i].step > 0; }
  const FileParts& parts() const noexcept { return parts_; }
  const std::vector<FlatColumn>& flat_columns() const noexcept { return flat_columns_; }
  // Checks that `size` bytes from `first` of block `i` on, all within it, are what was written.
  arrow::Status CheckParts(size_t i, uint64_t first, uint64_t size) const {
    if (parts_.Check(parts_[i], first, size)) return arrow::Status::OK();
    return Wrong(entries_[i].offset, "block ", i, " is damaged");
  }

  // Smallest and largest values and number of nulls of columns: see sstable_zones.hpp. A row for each block.
  arrow::Status ReadZones(std::shared_ptr<arrow::RecordBatch>* out) const noexcept;

  // Reads the whole file and checks what can be checked, past the cache. `name` becomes its name by content.
  arrow::Status Verify(std::string* name) const noexcept;

 private:
  arrow::Status OpenBytes(std::shared_ptr<arrow::Buffer> bytes);
  arrow::Status CheckEnds();
  arrow::Status CheckSchema() const;
  arrow::Status CheckIndex();
  arrow::Status CheckEntries() const;
  arrow::Status CheckKeys(const Block& block, size_t i) const;
  // As FindBlock above, for a key that begins as all of the file do; `word` is what follows.
  size_t FindBlock(std::string_view key, uint64_t word) const noexcept;
  arrow::Status CheckWrites(const Block& block, size_t i) const;
  arrow::Status VerifyParts(const Block& block, size_t i) const;
  arrow::Result<std::shared_ptr<const Block>> Decode(size_t i, bool check) const;
  template <typename... Words>
  arrow::Status Wrong(uint64_t offset, Words&&... words) const {
    return Damaged(name_, offset, std::forward<Words>(words)...);
  }
  // Bytes of an array that are not in the file's buffer: what was decompressed.
  int64_t BytesOutside(const arrow::ArrayData& array) const {
    int64_t bytes = 0;
    for (const auto& buffer : array.buffers) {
      const bool inside = buffer == nullptr || (buffer->data() >= bytes_->data() &&
                                                buffer->data() <= bytes_->data() + bytes_->size());
      bytes += inside ? 0 : buffer->capacity();
    }
    for (const auto& child : array.child_data) bytes += BytesOutside(*child);
    return bytes;
  }
  // Whether `place` lies within the index section from IndexHead on; what it names begins at a multiple of 64.
  bool Fits(const IndexPlace& place) const noexcept {
    const uint64_t room = seal_.index + seal_.index_bytes - head_offset_;
    return place.offset % kFileAlignment == 0 && place.offset >= kFirstHeadBytes && place.offset <= room &&
           place.bytes <= room - place.offset;
  }

  std::shared_ptr<arrow::Buffer> bytes_;
  std::string name_;
  std::shared_ptr<const Layout> layout_;
  std::shared_ptr<arrow::Schema> file_schema_;
  std::shared_ptr<BlockCache> cache_;
  FileSeal seal_;
  uint64_t head_offset_ = 0;  // Of IndexHead in the file.
  IndexHead head_;
  // Into the mapping:
  const BlockEntry* entries_ = nullptr;
  const char* keys_ = nullptr;
  BloomFilter bloom_;
  std::string common_;                 // The bytes that all keys of the file begin with,
  uint64_t skip_ = 0;                  // and how many they are.
  std::vector<uint64_t> words_;        // For each block the eight bytes of its last key after these,
  std::vector<uint64_t> first_words_;  // and of its first one.
  std::vector<FlatColumn> flat_columns_;  // None if no block can have parts.
  FileParts parts_;
  std::unique_ptr<std::atomic<bool>[]> checked_;  // For each block whether it has been found sound,
  std::unique_ptr<BlockSlot[]> slots_;            // and its place in the cache.
};

inline arrow::Status TableFile::Open(std::shared_ptr<arrow::Buffer> bytes, std::string name,
                                     std::shared_ptr<const Layout> layout, std::shared_ptr<BlockCache> cache,
                                     std::shared_ptr<const TableFile>* out) noexcept {
  return Guarded([&]() -> arrow::Status {
    auto file = std::make_shared<TableFile>();
    file->name_ = std::move(name);
    file->cache_ = std::move(cache);
    ARROW_ASSIGN_OR_RAISE(file->file_schema_, FileSchema(*layout));
    file->layout_ = std::move(layout);
    ARROW_RETURN_NOT_OK(file->OpenBytes(std::move(bytes)));
    *out = std::move(file);
    return arrow::Status::OK();
  });
}

inline arrow::Status TableFile::OpenBytes(std::shared_ptr<arrow::Buffer> bytes) {
  bytes_ = std::move(bytes);
  if (!bytes_->is_cpu()) return arrow::Status::Invalid("an sstable is read from memory of the CPU");
  ARROW_RETURN_NOT_OK(CheckEnds());
  ARROW_RETURN_NOT_OK(CheckSchema());
  ARROW_RETURN_NOT_OK(CheckIndex());
  ARROW_RETURN_NOT_OK(CheckEntries());
  const auto* sums = reinterpret_cast<const uint32_t*>(bytes_->data() + head_offset_ + head_.parts.offset);
  const auto* steps = reinterpret_cast<const uint64_t*>(bytes_->data() + head_offset_ + head_.words.offset);
  if (!parts_.Set(bytes_->data(), {entries_, head_.blocks}, keys_, {sums, head_.parts.bytes / 4},
                  {steps, head_.words.bytes / 8})) {
    return Wrong(head_offset_, "the index has parts of other blocks");
  }
  flat_columns_ = DescribeFlat(*file_schema_, layout_->key);
  if (flat_columns_.empty() && head_.parts.bytes > 0) return Wrong(head_offset_, "blocks of such columns have no parts");
  const auto count = static_cast<size_t>(head_.blocks);
  skip_ = CommonBytes(first_key(0), last_key(count - 1));
  common_ = first_key(0).substr(0, skip_);
  words_.reserve(count);
  first_words_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    words_.push_back(WordOf(last_key(i), skip_));
    first_words_.push_back(WordOf(first_key(i), skip_));
  }
  checked_ = std::make_unique<std::atomic<bool>[]>(count);
  slots_ = std::make_unique<BlockSlot[]>(count);
  return arrow::Status::OK();
}

// Finds the seal, and checks all that is under its checksums but the index section.
inline arrow::Status TableFile::CheckEnds() {
  const uint8_t* data = bytes_->data();
  const auto size = static_cast<uint64_t>(bytes_->size());
  if (size < kFileMagicBytes + kFileEndBytes) return Wrong(0, "an sstable of only ", size, " bytes");
  uint32_t footer_bytes;
  std::memcpy(&footer_bytes, data + size - kFileEndBytes, sizeof(footer_bytes));
  if (footer_bytes > size - kFileEndBytes) return Wrong(size - kFileEndBytes, "the footer is longer than its file");
  const uint64_t footer = size - kFileEndBytes - footer_bytes;
  if (!ReadSeal(data + footer, size - footer, &seal_)) return Wrong(footer, "the footer is damaged");
  if (seal_.version < kFileVersionMin || seal_.version > kFileVersion) {
    return arrow::Status::Invalid("sstable ", name_, " is of version ", seal_.version, ", this marble reads versions ",
                                  kFileVersionMin, " to ", kFileVersion);
  }
  if (seal_.size != size || seal_.header_bytes > seal_.index || seal_.index > footer ||
      seal_.index_bytes != footer - seal_.index) {
    return Wrong(footer, "the seal speaks of another file");
  }
  if (seal_.header_bytes < kFileMagicBytes + kMessagePrefixBytes ||
      ChecksumOf(data, seal_.header_bytes) != seal_.header_checksum) {
    return Wrong(0, "the header is damaged");
  }
  return arrow::Status::OK();
}

inline arrow::Status TableFile::CheckSchema() const {
  arrow::io::BufferReader reader(arrow::SliceBuffer(bytes_, kFileMagicBytes, seal_.header_bytes - kFileMagicBytes));
  arrow::ipc::DictionaryMemo memo;
  auto schema = arrow::ipc::ReadSchema(&reader, &memo);
  if (!schema.ok()) return Wrong(kFileMagicBytes, "the header holds no schema: ", schema.status().message());
  if (!(*schema)->Equals(*file_schema_, /*check_metadata=*/false)) {
    return arrow::Status::Invalid("sstable ", name_, " holds other columns than the table: ", (*schema)->num_fields(), " of them");
  }
  return arrow::Status::OK();
}

inline arrow::Status TableFile::CheckIndex() {
  const uint8_t* data = bytes_->data();
  if (ChecksumOf(data + seal_.index, seal_.index_bytes) != seal_.index_checksum) {
    return Wrong(seal_.index, "the index is damaged");
  }
  head_offset_ = AlignUp(seal_.index + kMessagePrefixBytes, kFileAlignment);
  const uint64_t end = seal_.index + seal_.index_bytes;
  const uint64_t head_bytes = seal_.version == kFileVersionMin ? kFirstHeadBytes : sizeof(IndexHead);
  if (head_offset_ > end || end - head_offset_ < head_bytes) return Wrong(seal_.index, "the index is cut short");
  // Mappings and Arrow's allocations begin at a multiple of 64; memory that does not cannot be used in place.
  if (reinterpret_cast<uintptr_t>(data) % alignof(IndexHead) != 0) {
    return arrow::Status::Invalid("the buffer of an sstable begins at a multiple of ", alignof(IndexHead), " bytes");
  }
  std::memcpy(&head_, data + head_offset_, head_bytes);
  if (!Fits(head_.entries) || !Fits(head_.keys) || !Fits(head_.bloom) || !Fits(head_.zones) ||
      (seal_.version > kFileVersionMin && (!Fits(head_.parts) || !Fits(head_.words))) || head_.parts.bytes % 4 != 0 ||
      head_.words.bytes % 8 != 0 || head_.blocks == 0 ||
      head_.entries.bytes % sizeof(BlockEntry) != 0 || head_.entries.bytes / sizeof(BlockEntry) != head_.blocks ||
      head_.bloom.bytes % kBloomLineBytes != 0) {
    return Wrong(head_offset_, "the index names parts that are not there");
  }
  entries_ = reinterpret_cast<const BlockEntry*>(data + head_offset_ + head_.entries.offset);
  keys_ = reinterpret_cast<const char*>(data + head_offset_ + head_.keys.offset);
  bloom_ = BloomFilter(data + head_offset_ + head_.bloom.offset, head_.bloom.bytes / kBloomLineBytes);
  return arrow::Status::OK();
}

// Blocks follow each other from the header to the index, and so do their keys.
inline arrow::Status TableFile::CheckEntries() const {
  uint64_t offset = seal_.header_bytes;
  uint64_t key_offset = 0;
  uint64_t rows = 0;
  for (size_t i = 0; i < head_.blocks; ++i) {
    const BlockEntry& entry = entries_[i];
    const uint64_t key_bytes = uint64_t{entry.first_key_bytes} + entry.last_key_bytes;
    if (entry.offset != offset || entry.bytes > seal_.index - offset || entry.metadata_bytes < kMessagePrefixBytes ||
        entry.metadata_bytes > entry.bytes || entry.rows == 0 || entry.tombstones > entry.rows ||
        entry.step > entry.rows || entry.key_offset != key_offset || key_bytes > head_.keys.bytes - key_offset) {
      return Wrong(head_offset_ + head_.entries.offset + i * sizeof(BlockEntry), "entry ", i, " of the index is wrong");
    }
    const bool ascends = entry.rows == 1 ? first_key(i) == last_key(i) : first_key(i) < last_key(i);
    if (!ascends || (i > 0 && last_key(i - 1) >= first_key(i))) {
      return Wrong(head_offset_ + head_.keys.offset + key_offset, "the keys of block ", i, " do not ascend");
    }
    offset += entry.bytes;
    key_offset += key_bytes;
    rows += entry.rows;
  }
  if (offset != seal_.index || key_offset != head_.keys.bytes || rows != head_.rows) {
    return Wrong(head_offset_, "the index does not cover its file");
  }
  return arrow::Status::OK();
}

inline size_t TableFile::FindBlock(std::string_view key) const noexcept {
  // A key that does not begin as all of the file's keys do lies before or behind them.
  const int order = key.substr(0, skip_).compare(common_);
  if (order != 0) return order < 0 ? 0 : blocks();
  return FindBlock(key, WordOf(key, skip_));
}

inline size_t TableFile::FindBlock(std::string_view key, uint64_t word) const noexcept {
  size_t i = LowerBoundWord(words_.data(), 0, words_.size(), word);
  if (i == blocks() || words_[i] != word || last_key(i) >= key) return i;
  // Words that tie are mostly few; where they are not, halve.
  size_t end = blocks();
  for (++i; i < end;) {
    const size_t middle = i + (end - i) / 2;
    if (last_key(middle) < key) {
      i = middle + 1;
    } else {
      end = middle;
    }
  }
  return i;
}

inline arrow::Result<std::shared_ptr<const Block>> TableFile::Load(size_t i) const {
  if (auto block = cache_->Get(&slots_[i])) return block;
  ARROW_ASSIGN_OR_RAISE(auto block, Decode(i, !checked_[i].load(std::memory_order_relaxed)));
  checked_[i].store(true, std::memory_order_relaxed);
  const auto bytes = static_cast<uint64_t>(block->nbytes);
  return cache_->Put(&slots_[i], std::move(block), bytes);
}

inline arrow::Result<std::shared_ptr<const Block>> TableFile::Decode(size_t i, bool check) const {
  const BlockEntry& entry = entries_[i];
  const uint64_t body_bytes = entry.bytes - entry.metadata_bytes;
  if (check && ChecksumOf(bytes_->data() + entry.offset, entry.bytes) != entry.checksum) {
    return Wrong(entry.offset, "block ", i, " is damaged");
  }
  const auto at = static_cast<int64_t>(entry.offset);
  auto metadata = arrow::SliceBuffer(bytes_, at + static_cast<int64_t>(kMessagePrefixBytes),
                                     entry.metadata_bytes - static_cast<int64_t>(kMessagePrefixBytes));
  auto body = arrow::SliceBuffer(bytes_, at + entry.metadata_bytes, static_cast<int64_t>(body_bytes));
  auto options = arrow::ipc::IpcReadOptions::Defaults();
  options.use_threads = false;
  const auto read = [&]() -> arrow::Result<std::shared_ptr<arrow::RecordBatch>> {
    ARROW_ASSIGN_OR_RAISE(auto message, arrow::ipc::Message::Open(std::move(metadata), std::move(body)));
    if (message->type() != arrow::ipc::MessageType::RECORD_BATCH || message->body() == nullptr ||
        message->metadata_version() != arrow::ipc::MetadataVersion::V5) {
      return arrow::Status::Invalid("not a record batch");
    }
    uint64_t decoded = 0;
    if (!CountDecoded(*message->metadata(), *message->body(), &decoded) || decoded > entry.decoded_bytes) {
      return arrow::Status::Invalid("its buffers would have more bytes than the index says");
    }
    ARROW_ASSIGN_OR_RAISE(auto batch, arrow::ipc::ReadRecordBatch(*message, file_schema_, nullptr, options));
    if (batch->num_rows() != int64_t{entry.rows}) return arrow::Status::Invalid("another number of rows");
    if (check) ARROW_RETURN_NOT_OK(batch->ValidateFull());
    return batch;
  };
  auto batch = read();
  if (batch.status().IsOutOfMemory()) return batch.status();
  if (!batch.ok()) return Wrong(entry.offset, "block ", i, " cannot be read: ", batch.status().message());
  auto columns = (*batch)->column_data();
  auto block = std::make_shared<Block>();
  block->deletions = std::move(columns.back());
  columns.pop_back();
  block->indexes = std::make_shared<arrow::UInt64Array>(std::move(columns.back()));
  columns.pop_back();
  if (block->deletions->GetNullCount() > 0 || block->indexes->null_count() > 0) {
    return Wrong(entry.offset, "block ", i, " has rows without an index");
  }
  if (entry.tombstones > 0) block->deleted = block->deletions->buffers[1]->data();
  std::vector<std::shared_ptr<arrow::ArrayData>> key_columns;
  for (const int column : layout_->key) key_columns.push_back(columns[static_cast<size_t>(column)]);
  auto keys = layout_->codec->EncodeColumns(key_columns, entry.rows);
  if (!keys.ok()) return Wrong(entry.offset, "block ", i, " has no sound keys: ", keys.status().message());
  block->keys = *std::move(keys);
  block->skip = CommonBytes(first_key(i), last_key(i));
  block->words = MakePoolArray<uint64_t>(entry.rows);
  for (int64_t row = 0; row < entry.rows; ++row) {
    block->words[static_cast<size_t>(row)] = block->keys->Word(row, block->skip);
  }
  if (check) ARROW_RETURN_NOT_OK(CheckKeys(*block, i));
  block->source.rows = entry.rows;
  block->source.keys = block->keys;
  for (const auto& column : columns) AddColumn(&block->source, column);
  block->rows = arrow::RecordBatch::Make(layout_->get_schema, entry.rows, std::move(columns));
  // Objects cost about as much for each column, however few rows there are.
  block->nbytes = static_cast<int64_t>(block->keys->nbytes()) + 8 * block->size() + 512 + 320 * file_schema_->num_fields();
  for (const auto& column : block->source.columns) block->nbytes += BytesOutside(*column);
  if (check) ARROW_RETURN_NOT_OK(CheckWrites(*block, i));
  return block;
}

// Whether keys ascend between those that the index names.
inline arrow::Status TableFile::CheckKeys(const Block& block, size_t i) const {
  const KeyColumn& keys = *block.keys;
  if (KeyBytes(keys, 0) != first_key(i) || KeyBytes(keys, keys.rows - 1) != last_key(i)) {
    return Wrong(entries_[i].offset, "block ", i, " has other keys than the index says");
  }
  // Where two keys begin as the first one does, and mostly they do, the words behind that tell their order.
  const uint64_t* words = block.words.get();
  const std::string_view common = first_key(i).substr(0, block.skip);
  bool alike = true;
  for (int64_t row = 1; row < keys.rows; ++row) {
    const std::string_view key = KeyBytes(keys, row);
    const bool before = std::exchange(alike, key.size() >= common.size() &&
                                                 std::memcmp(key.data(), common.data(), common.size()) == 0);
    if (before && alike && words[row - 1] < words[row]) continue;
    if (KeyBytes(keys, row - 1) >= key) return Wrong(entries_[i].offset, "the keys of block ", i, " do not ascend");
  }
  return arrow::Status::OK();
}

// Whether the block's writes are as its entry in the index says.
inline arrow::Status TableFile::CheckWrites(const Block& block, size_t i) const {
  const BlockEntry& entry = entries_[i];
  const uint64_t* indexes = block.indexes->raw_values();
  const auto [smallest, largest] = std::minmax_element(indexes, indexes + block.size());
  const int64_t tombstones =
      arrow::internal::CountSetBits(block.deletions->buffers[1]->data(), block.deletions->offset, block.size());
  if (*smallest != entry.first_index || *largest != entry.last_index || tombstones != int64_t{entry.tombstones}) {
    return Wrong(entry.offset, "block ", i, " has other writes than the index says");
  }
  return arrow::Status::OK();
}

// Whether what the index has of the block's parts is true.
inline arrow::Status TableFile::VerifyParts(const Block& block, size_t i) const {
  const BlockEntry& entry = entries_[i];
  bool right = parts_.CheckAll(parts_[i]);
  const auto words = parts_.Words(parts_[i]);
  for (size_t at = 0; at < words.size(); ++at) right = right && words[at] == block.words[at * entry.step];
  return right ? arrow::Status::OK() : Wrong(entry.offset, "block ", i, " has other parts than the index says");
}

inline arrow::Status TableFile::ReadZones(std::shared_ptr<arrow::RecordBatch>* out) const noexcept {
  return Guarded([&]() -> arrow::Status {
    const uint64_t offset = head_offset_ + head_.zones.offset;
    const auto read = [&]() -> arrow::Result<std::shared_ptr<arrow::RecordBatch>> {
      auto stream = std::make_shared<arrow::io::BufferReader>(
          arrow::SliceBuffer(bytes_, static_cast<int64_t>(offset), static_cast<int64_t>(head_.zones.bytes)));
      auto options = arrow::ipc::IpcReadOptions::Defaults();
      options.use_threads = false;
      ARROW_ASSIGN_OR_RAISE(auto reader, arrow::ipc::RecordBatchStreamReader::Open(stream, options));
      std::shared_ptr<arrow::RecordBatch> batch;
      ARROW_RETURN_NOT_OK(reader->ReadNext(&batch));
      if (batch == nullptr || batch->num_rows() != static_cast<int64_t>(head_.blocks)) {
        return arrow::Status::Invalid("not a row for each block");
      }
      ARROW_RETURN_NOT_OK(batch->ValidateFull());
      return batch;
    };
    auto batch = read();
    if (!batch.ok()) return Wrong(offset, "the zone maps cannot be read: ", batch.status().message());
    *out = *std::move(batch);
    return arrow::Status::OK();
  });
}

inline arrow::Status TableFile::Verify(std::string* name) const noexcept {
  return Guarded([&]() -> arrow::Status {
    // What was checked when the file was opened may have changed on the disk since.
    TableFile again;
    again.name_ = name_;
    again.layout_ = layout_;
    again.file_schema_ = file_schema_;
    again.cache_ = cache_;
    ARROW_RETURN_NOT_OK(again.OpenBytes(bytes_));
    for (size_t i = 0; i < again.blocks(); ++i) {
      ARROW_ASSIGN_OR_RAISE(const auto block, again.Decode(i, true));
      ARROW_RETURN_NOT_OK(again.VerifyParts(*block, i));
      for (int64_t row = 0; row < block->size(); ++row) {
        if (!MayContain(HashKey(block->key(row)))) {
          return Wrong(head_offset_ + head_.bloom.offset, "the bloom filter lacks a key of block ", i);
        }
      }
    }
    std::shared_ptr<arrow::RecordBatch> zones;
    ARROW_RETURN_NOT_OK(again.ReadZones(&zones));
    *name = ContentName(bytes_->data(), static_cast<uint64_t>(bytes_->size()));
    return arrow::Status::OK();
  });
}

}  // namespace marble
