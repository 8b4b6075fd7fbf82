package Demo::Guest;

# The guest of the demo has an ext4 disk with real files, which is mounted and in use, and a data disk to
# which it writes numbered blocks, so that the disk's content at any instant is known.

use v5.36;

use File::Basename qw(dirname);
use File::Copy ();
use File::Find ();
use File::Path qw(make_path);

use Demo::Screen qw(now run);
use PBA::Test::Cache;
use PBA::Test::Model;
use PBA::Test::VM;

my $MIB = 1024 * 1024;
my $FILES_SIZE = 256 * $MIB;
my $DATA_SIZE = 128 * $MIB;
my $CONTENT_LIMIT = 32 * $MIB;
my @CONTENT_FROM = qw(/usr/share/doc /usr/share/perl);

# The guest writes to blocks that are spread over the first part of the data disk.
my %CHURN = (seed => 2024, blocks => 48 * $MIB / 4096);
my $PAUSE_US = 4000;
my $WRITES = 300;
my $WRITES_MEANWHILE = 60;

sub new ($class, $dir) {
    my @disks = ({ id => 'data', size => $DATA_SIZE });
    return bless { dir => $dir, model => PBA::Test::Model->new(disks => \@disks, %CHURN) }, $class;
}

# ---- creation ----

sub kernel_version ($self) {
    PBA::Test::Cache->initramfs;
    return PBA::Test::Cache->kernel->{version};
}

# Creates a directory with some real files. Returns their number and size.
sub collect_files ($self) {
    my ($count, $bytes) = (0, 0);
    my $collect = sub {
        my $size = -f $_ && !-l $_ && -r $_ ? -s _ : 0;
        return if $size < 4096 || $size > $MIB || $bytes + $size > $CONTENT_LIMIT;
        my $copy = $self->content . $_;
        make_path(dirname($copy));
        File::Copy::copy($_, $copy) or die "$_: $!\n";
        $count++;
        $bytes += $size;
    };
    my @from = grep { -d } @CONTENT_FROM;
    File::Find::find({ wanted => $collect, no_chdir => 1 }, @from) if @from;
    die "no files in @CONTENT_FROM\n" if !$count;
    return ($count, $bytes);
}

# The directory on the host with the files that were copied to the file system, below usr.
sub content ($self) {
    return "$self->{dir}/content";
}

sub make_file_system ($self) {
    my $image = "$self->{dir}/files.raw";
    open(my $fh, '>', $image) or die "$image: $!\n";
    truncate($fh, $FILES_SIZE) or die "$image: $!\n";
    close($fh) or die "$image: $!\n";
    my $options = 'lazy_itable_init=0,lazy_journal_init=0';
    run(qw(mke2fs -q -F -t ext4 -E), $options, '-d', $self->content, $image);
    return;
}

sub boot ($self) {
    my @disks = (
        { id => 'files', file => "$self->{dir}/files.raw" },
        { id => 'data', size => $DATA_SIZE },
    );
    my $vm = $self->{vm} = PBA::Test::VM->start(disks => \@disks);
    $self->{disk_of} = { map { $vm->disk($_)->{device} => $_ } qw(files data) };

    # Proxmox VE's commands expect the preparations that qemu-server makes.
    if ($vm->is_proxmox) {
        $vm->add_fleecing_node($_) for qw(files data);
    }
    return;
}

sub qemu_version ($self) {
    return join('.', $self->{vm}->version->@*);
}

sub vm ($self) {
    return $self->{vm};
}

sub qmp_path ($self) {
    return $self->{vm}->qmp_path;
}

# The names of the disks in a backup, and the disk of such a name.
sub devices ($self) {
    return sort keys $self->{disk_of}->%*;
}

sub disk_of ($self, $device) {
    return $self->{disk_of}{$device};
}

sub image_of ($self, $disk) {
    return $self->{vm}->disk($disk)->{file};
}

sub model ($self) {
    return $self->{model};
}

# ---- writes ----

sub start_writing ($self) {
    my $agent = $self->{vm}->guest;
    $agent->mount('files');
    $agent->start_files;
    $agent->start_churn(disks => ['data'], pause_us => $PAUSE_US, %CHURN);
    $self->{writes} = 1;
    return;
}

sub write_on ($self) {
    $self->{vm}->guest->wait_more_churn($WRITES);
    return;
}

sub stop_writing ($self) {
    my $agent = $self->{vm}->guest;
    $agent->stop_files;
    $self->{last} = $agent->stop_churn;
    $self->{writes} = 0;
    $agent->umount;
    $agent->sync;
    return;
}

# The number of the last write to the data disk.
sub last_write ($self) {
    return $self->{writes} ? $self->{vm}->guest->churn_status->{last} : $self->{last};
}

# The longest write since the previous call, in seconds.
sub longest_write ($self) {
    return if !$self->{writes};

    # A delayed write is counted when it is done.
    $self->{vm}->guest->wait_more_churn(1);
    return $self->{vm}->guest->latency->{longest_us} / 1e6;
}

# Called before and after the setup of a backup. They note in the backup how long the setup took, how long
# the guest's writes took before and during it, and between which writes the instant of the backup is.
# Then the guest gets time to overwrite data that has not been read yet.
sub before_setup ($self, $backup) {
    $backup->{'write before'} = $self->longest_write;
    $backup->{from} = $self->last_write;
    $backup->{began} = now();
    return;
}

sub after_setup ($self, $backup) {
    my $ended = now();
    $backup->{'setup seconds'} = $ended - $backup->{began};

    # One more write may be done but not yet counted.
    $backup->{to} = $self->last_write + ($self->{writes} ? 1 : 0);
    $backup->{'write during'} = $self->longest_write;
    $self->{vm}->guest->wait_more_churn($WRITES_MEANWHILE) if $self->{writes};
    $backup->{waited} = now() - $ended;
    return;
}

1;
