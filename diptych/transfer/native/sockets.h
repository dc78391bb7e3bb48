// The same blocks over a socket: sends them from a pool and lands them in one, no copy in between, the GIL free.
//
// A batch is a stream of bytes: block by block, and of each block its pieces. Every call finds its place in it by the
// number of bytes done so far, builds iovecs from there (neighbours in memory become one), and hands them to the
// kernel. Part of copy.cpp, whose checksum it takes of each block as it lands, while the block is still in the cache.
//
// Not responsible for checking ids or pieces (native/sockets.py does), nor for frames (transfer/frames.py).

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

namespace {

constexpr int MAX_IOVECS = 1024;           // IOV_MAX of Linux
constexpr int64_t LANDING_BYTES = 1 << 19;  // received at once: summed before it leaves the second-level cache

struct Batch {
    uint8_t *blocks;
    const int32_t *ids;
    int64_t num_ids, block_bytes;
    const int64_t *offsets, *lengths;
    int64_t num_pieces, payload;  // payload: bytes of one block's pieces

    Batch(uint8_t *blocks, const int32_t *ids, int64_t num_ids, int64_t block_bytes, const int64_t *offsets,
          const int64_t *lengths, int64_t num_pieces)
        : blocks(blocks), ids(ids), num_ids(num_ids), block_bytes(block_bytes), offsets(offsets), lengths(lengths),
          num_pieces(num_pieces), payload(0) {
        for (int64_t p = 0; p < num_pieces; p++) payload += lengths[p];
    }

    int64_t size() const { return num_ids * payload; }

    // Where the bytes from `at` on lie, at most `limit` of them and `room` runs. Returns the number of runs.
    int runs(int64_t at, int64_t limit, iovec *run, int room) const {
        int used = 0;
        int64_t block = at / payload, skip = at % payload;
        for (; block < num_ids && limit > 0; block++, skip = 0) {
            uint8_t *base = blocks + ids[block] * block_bytes;
            for (int64_t p = 0; p < num_pieces && limit > 0; p++) {
                if (skip >= lengths[p]) { skip -= lengths[p]; continue; }
                uint8_t *start = base + offsets[p] + skip;
                int64_t length = lengths[p] - skip;
                skip = 0;
                if (length > limit) length = limit;
                if (used && (uint8_t *)run[used - 1].iov_base + run[used - 1].iov_len == start) {
                    run[used - 1].iov_len += length;
                } else if (used < room) {
                    run[used++] = {start, (size_t)length};
                } else {
                    return used;
                }
                limit -= length;
            }
        }
        return used;
    }
};

}  // namespace

extern "C" {

// Send `head` and then the batch; waits while the socket is full. Returns 0, or -errno.
int64_t diptych_send(int fd, const uint8_t *head, int64_t head_bytes, uint8_t *blocks, const int32_t *ids, int64_t n,
                     int64_t block_bytes, const int64_t *offsets, const int64_t *lengths, int64_t num_pieces) {
    const Batch batch(blocks, ids, n, block_bytes, offsets, lengths, num_pieces);
    iovec runs[MAX_IOVECS];
    int64_t at = -head_bytes;  // below 0: within the head
    while (at < batch.size()) {
        int used = 0;
        if (at < 0) runs[used++] = {(void *)(head + head_bytes + at), (size_t)-at};
        used += batch.runs(at < 0 ? 0 : at, INT64_MAX, runs + used, MAX_IOVECS - used);
        msghdr message = {};
        message.msg_iov = runs;
        message.msg_iovlen = used;
        const ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent >= 0) at += sent;
        else if (errno != EINTR) return -errno;
    }
    return 0;
}

// Land the batch from its byte `at` on. Returns the byte reached: the end, or less where `cancel` was set or `wake`
// became readable while there was nothing to receive. -errno on failure, -ECONNRESET for the end of the stream.
// `sums` (uint64 [n], or null) is filled block by block, where a block is a single piece.
int64_t diptych_receive(int fd, int wake, uint8_t *blocks, const int32_t *ids, int64_t n, int64_t block_bytes,
                        const int64_t *offsets, const int64_t *lengths, int64_t num_pieces, int64_t at, uint64_t *sums,
                        const int32_t *cancel) {
    const Batch batch(blocks, ids, n, block_bytes, offsets, lengths, num_pieces);
    iovec runs[MAX_IOVECS];
    while (at < batch.size() && !asked_to_stop(cancel)) {
        msghdr message = {};
        message.msg_iov = runs;
        message.msg_iovlen = batch.runs(at, LANDING_BYTES, runs, MAX_IOVECS);
        const ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
        if (got > 0) {
            const int64_t first = at / batch.payload, end = (at += got) / batch.payload;
            for (int64_t i = first; sums && i < end; i++)
                sums[i] = passes.sum(nullptr, blocks + ids[i] * block_bytes, block_bytes);
        } else if (got == 0) {
            return -ECONNRESET;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            pollfd waiting[2] = {{fd, POLLIN, 0}, {wake, POLLIN, 0}};
            if (poll(waiting, 2, -1) < 0 && errno != EINTR) return -errno;
            if (waiting[1].revents) return at;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return at;
}

}  // extern "C"
