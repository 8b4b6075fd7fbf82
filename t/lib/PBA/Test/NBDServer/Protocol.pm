package PBA::Test::NBDServer::Protocol;

# Numbers of the NBD protocol, as in the NBD project's doc/proto.md.

use v5.36;
no warnings 'portable';    # 64 bit magic numbers

use Exporter qw(import);

use constant {
    OPTION_REPLY_MAGIC => 0x0003e889045565a9,
    REQUEST_MAGIC => 0x25609513,
    SIMPLE_MAGIC => 0x67446698,
    CHUNK_MAGIC => 0x668e33ef,

    REP_ACK => 1,
    REP_SERVER => 2,
    REP_INFO => 3,
    REP_META_CONTEXT => 4,
    REP_ERR_UNSUP => 0x80000001,
    REP_ERR_INVALID => 0x80000003,
    REP_ERR_UNKNOWN => 0x80000006,

    # minimum, preferred, maximum, as QEMU says
    BLOCK_SIZES => [1, 4096, 32 << 20],

    # has flags, flush, trim, DF, multiple connections: as QEMU advertises a writable export
    TRANSMISSION_FLAGS => 1 | 1 << 2 | 1 << 5 | 1 << 7 | 1 << 8,
    ZEROES_FLAG => 1 << 6,
    FLAGS_OF_OPTIONS => { no_flush => 1 << 2, no_trim => 1 << 5, no_multi => 1 << 8 },

    CHUNK_NONE => 0,
    CHUNK_DATA => 1,
    CHUNK_BLOCK_STATUS => 5,
    CHUNK_ERROR => 32769,
    CHUNK_DONE => 1,

    FLAG_REQ_ONE => 1 << 3,

    HOLE_AND_ZERO => 1 | 1 << 1,

    BITMAP_ID => 1,
    ALLOCATION_ID => 2,
    WRONG_ID => 4711,
};

our @EXPORT
    = qw(BLOCK_SIZES OPTION_REPLY_MAGIC REQUEST_MAGIC SIMPLE_MAGIC CHUNK_MAGIC REP_ACK REP_SERVER REP_INFO REP_META_CONTEXT REP_ERR_UNSUP REP_ERR_INVALID REP_ERR_UNKNOWN TRANSMISSION_FLAGS ZEROES_FLAG FLAGS_OF_OPTIONS CHUNK_NONE CHUNK_DATA CHUNK_BLOCK_STATUS CHUNK_ERROR CHUNK_DONE FLAG_REQ_ONE HOLE_AND_ZERO BITMAP_ID ALLOCATION_ID WRONG_ID);

1;
